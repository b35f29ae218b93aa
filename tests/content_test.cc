// Hash, compare and zero test: every size of page, every place of a difference, any alignment, and not a byte beyond.
#include "content/content.h"

#include "content/hash_avx2.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <set>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace ksmu::content {
namespace {

constexpr std::uint64_t kSeed = 0x1234'5678'9abc'def0;

// Memory of the test's own with inaccessible pages on both sides.
class Fenced {
 public:
  explicit Fenced(std::size_t bytes) : fence_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))), bytes_(bytes) {
    whole_ = static_cast<unsigned char*>(
        mmap(nullptr, bytes + 2 * fence_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (whole_ == MAP_FAILED || mprotect(whole_ + fence_, bytes, PROT_READ | PROT_WRITE) != 0) abort();
  }
  ~Fenced() { munmap(whole_, bytes_ + 2 * fence_); }
  unsigned char* data() const { return whole_ + fence_; }

 private:
  std::size_t fence_, bytes_;
  unsigned char* whole_;
};

void Fill(unsigned char* p, std::size_t bytes, std::uint64_t seed) {
  for (std::size_t i = 0; i < bytes; i += 8) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    std::memcpy(p + i, &seed, 8);
  }
}

class Content : public ::testing::TestWithParam<std::size_t> {
 protected:
  // Every offset of a small page; of a large one the ends, and a sample that has every remainder of 64.
  template <typename F>
  void ForEachOffset(F&& f) const {
    const std::size_t bytes = GetParam();
    for (std::size_t i = 0; i < bytes; i += bytes <= 4096 || i < 512 || i + 512 >= bytes ? 1 : 61) f(i);
  }
};

TEST_P(Content, ZeroMeansEveryByte) {
  const std::size_t bytes = GetParam();
  Fenced page(bytes);
  unsigned char* p = page.data();
  EXPECT_TRUE(IsZero(p, bytes));
  ForEachOffset([&](std::size_t i) {
    for (const int bit : {0x01, 0x80}) {
      p[i] = static_cast<unsigned char>(bit);
      EXPECT_FALSE(IsZero(p, bytes)) << "byte " << i;
    }
    p[i] = 0;
  });
  EXPECT_TRUE(IsZero(p, bytes));
  std::memset(p, 0xff, bytes);
  EXPECT_FALSE(IsZero(p, bytes)) << "all equal is not all zero";
  std::memset(p, 0, 8);
  EXPECT_FALSE(IsZero(p, bytes));
}

TEST_P(Content, EqualMeansEveryByte) {
  const std::size_t bytes = GetParam();
  Fenced one(bytes), other(bytes);
  Fill(one.data(), bytes, 1);
  Fill(other.data(), bytes, 1);
  EXPECT_TRUE(Equal(one.data(), other.data(), bytes));
  EXPECT_TRUE(Equal(one.data(), one.data(), bytes));
  ForEachOffset([&](std::size_t i) {
    for (const int bit : {0x01, 0x80}) {
      other.data()[i] ^= static_cast<unsigned char>(bit);
      EXPECT_FALSE(Equal(one.data(), other.data(), bytes)) << "byte " << i;
      EXPECT_FALSE(Equal(other.data(), one.data(), bytes)) << "byte " << i;
      other.data()[i] ^= static_cast<unsigned char>(bit);
    }
  });
  EXPECT_TRUE(Equal(one.data(), other.data(), bytes));
}

TEST_P(Content, HashSeesEveryByteAndTheSeed) {
  const std::size_t bytes = GetParam();
  Fenced page(bytes), copy(bytes);
  Fill(page.data(), bytes, 1);
  Fill(copy.data(), bytes, 1);
  const std::uint64_t whole = Hash(page.data(), bytes, kSeed);
  EXPECT_EQ(whole, Hash(copy.data(), bytes, kSeed));
  EXPECT_EQ(whole, XXH3_64bits_withSeed(page.data(), bytes, kSeed)) << "frames are found by other processes' hashes";
  EXPECT_EQ(whole, HashPlain(page.data(), bytes, kSeed)) << "other machines', without the wider vectors";
  EXPECT_NE(whole, Hash(page.data(), bytes, kSeed + 1));
  std::set<std::uint64_t> seen = {whole};
  std::set<std::uint32_t> upper = {static_cast<std::uint32_t>(whole >> 32)};  // what page words remember
  std::size_t tried = 1;
  ForEachOffset([&](std::size_t i) {
    page.data()[i] ^= 1;
    const std::uint64_t h = Hash(page.data(), bytes, kSeed);
    page.data()[i] ^= 1;
    EXPECT_TRUE(seen.insert(h).second) << "byte " << i;
    upper.insert(static_cast<std::uint32_t>(h >> 32));
    ++tried;
  });
  EXPECT_GE(upper.size() + 2, tried) << "the upper half alone tells contents apart";
}

TEST_P(Content, AlignmentMakesNoDifference) {
  const std::size_t bytes = GetParam();
  Fenced page(bytes), room(bytes + 4096);
  Fill(page.data(), bytes, 3);
  const std::uint64_t hash = Hash(page.data(), bytes, kSeed);
  for (const std::size_t shift : {0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 4095, 4096}) {
    unsigned char* p = room.data() + shift;
    std::memset(room.data(), 0xee, bytes + 4096);
    std::memcpy(p, page.data(), bytes);
    EXPECT_EQ(Hash(p, bytes, kSeed), hash) << shift;
    EXPECT_TRUE(Equal(p, page.data(), bytes)) << shift;
    EXPECT_TRUE(Equal(page.data(), p, bytes)) << shift;
    p[bytes - 1] ^= 1;
    EXPECT_FALSE(Equal(p, page.data(), bytes)) << shift;
    EXPECT_NE(Hash(p, bytes, kSeed), hash) << shift;
    std::memset(p, 0, bytes);
    EXPECT_TRUE(IsZero(p, bytes)) << shift << ": what lies around it is not part of it";
    p[bytes - 1] = 1;
    EXPECT_FALSE(IsZero(p, bytes)) << shift;
  }
}

INSTANTIATE_TEST_SUITE_P(PageSizes, Content, ::testing::Values(4096, 8192, 16384, 32768, 65536));

}  // namespace
}  // namespace ksmu::content
