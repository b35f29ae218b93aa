// The kernel's texts from which the tuner knows how short memory is.
#include "broker/tuner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>

namespace ksmu::broker {
namespace {

constexpr char kMeminfo[] =
    "MemTotal:       24684092 kB\n"
    "MemFree:        23675348 kB\n"
    "MemAvailable:   23704040 kB\n"
    "Buffers:            1436 kB\n"
    "Cached:           266192 kB\n"
    "HugePages_Total:       0\n"
    "Hugetlb:               0 kB\n"
    "DirectMap1G:    20971520 kB\n";
constexpr char kPsi[] =
    "some avg10=12.34 avg60=1.50 avg300=0.00 total=123456\n"
    "full avg10=99.00 avg60=0.00 avg300=0.00 total=0\n";

TEST(TunerParse, WhatTheKernelWrites) {
  const Pressure pressure = ParsePressure(kMeminfo, kPsi);
  EXPECT_EQ(pressure.total_bytes, std::uint64_t{24684092} * 1024);
  EXPECT_EQ(pressure.available_bytes, std::uint64_t{23704040} * 1024);
  EXPECT_DOUBLE_EQ(pressure.psi_some_avg10, 12.34);
  EXPECT_EQ(ParsePressure(kMeminfo, "").psi_some_avg10, -1);
  EXPECT_EQ(ParsePressure("", kPsi).total_bytes, 0u);
  EXPECT_DOUBLE_EQ(ParsePressure("", kPsi).psi_some_avg10, 12.34);
  EXPECT_EQ(ParsePressure("", "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n").psi_some_avg10, 0);
}

TEST(TunerParse, HugePagesSetAsideAreNobodysMemory) {
  const Pressure pressure = ParsePressure("MemTotal: 1000 kB\nMemAvailable: 150 kB\nHugetlb: 800 kB\n", "");
  EXPECT_EQ(pressure.total_bytes, 200u * 1024);
  EXPECT_EQ(pressure.available_bytes, 150u * 1024);
  // More than there can be.
  EXPECT_EQ(ParsePressure("MemTotal: 1000 kB\nMemAvailable: 150 kB\nHugetlb: 900 kB\n", "").total_bytes, 1000u * 1024);
  EXPECT_EQ(ParsePressure("MemTotal: 1000 kB\nMemAvailable: 150 kB\nHugetlb: x kB\n", "").total_bytes, 1000u * 1024);
}

TEST(TunerParse, MalformedIsNotKnown) {
  for (const char* text : {
           "", "\n", "\n\n\n", ":", "MemTotal:", "MemTotal:\nMemAvailable:\n", "MemTotal: 100 kB\n", "MemAvailable: 100 kB\n",
           "MemTotal: 100\nMemAvailable: 50\n", "MemTotal: 100 MB\nMemAvailable: 50 MB\n", "MemTotal: -100 kB\nMemAvailable: 50 kB\n",
           "MemTotal: 100 kB\nMemAvailable: 101 kB\n", "MemTotal: 99999999999999999999999 kB\nMemAvailable: 50 kB\n",
           "MemTotal: 18014398509481984 kB\nMemAvailable: 1 kB\n", "MemTotal: 1e3 kB\nMemAvailable: 1 kB\n",
           "MemTotal: 0x10 kB\nMemAvailable: 1 kB\n", " MemTotal: 100 kB\n MemAvailable: 50 kB\n", "MemTotal: 100 kBMemAvailable: 50 kB",
           "memtotal: 100 kB\nmemavailable: 50 kB\n", "MemTotal: 100 kB \nMemAvailable: 50 kB\n",
       }) {
    const Pressure pressure = ParsePressure(text, "");
    EXPECT_EQ(pressure.total_bytes, 0u) << text;
    EXPECT_EQ(pressure.available_bytes, 0u) << text;
  }
  for (const char* text : {
           "", "\n", "some", "some \n", "some avg10=", "some avg10=\n", "some avg10= 3\n", "some avg10=x\n", "some avg10=nan avg60=0\n",
           "some avg10=inf avg60=0\n", "some avg10=-1.00 avg60=0\n", "some avg10=100.01 avg60=0\n", "some avg10=1e1 avg60=0\n",
           "some avg10=12,3 avg60=0\n", "full avg10=12.00 avg60=0\n", "some avg60=12.00\n", "avg10=12.00\n", "some avg10=1.0.0 \n",
       }) {
    EXPECT_EQ(ParsePressure("", text).psi_some_avg10, -1) << text;
  }
  // As far as it goes.
  EXPECT_EQ(ParsePressure("MemTotal: 100 kB\nMemAvailable: 50 kB", "").total_bytes, 100u * 1024);
  EXPECT_EQ(ParsePressure("", "some avg10=7").psi_some_avg10, 7);
}

// Cut anywhere, a byte changed anywhere: never more available than there is, never absurd.
TEST(TunerParse, DamagedTexts) {
  const std::string meminfo = kMeminfo, psi = kPsi;
  const auto check = [](const std::string& m, const std::string& p) {
    const Pressure pressure = ParsePressure(m, p);
    EXPECT_LE(pressure.available_bytes, pressure.total_bytes) << m;
    EXPECT_TRUE(pressure.psi_some_avg10 == -1 || (pressure.psi_some_avg10 >= 0 && pressure.psi_some_avg10 <= 100)) << p;
  };
  for (std::size_t size = 0; size <= meminfo.size(); ++size) check(meminfo.substr(0, size), psi.substr(0, std::min(size, psi.size())));
  std::mt19937 random(3);
  for (int i = 0; i < 20'000; ++i) {
    std::string m = meminfo, p = psi;
    for (int k = 0; k < 3; ++k) {
      m[random() % m.size()] = static_cast<char>(random());
      p[random() % p.size()] = static_cast<char>(random());
    }
    check(m, p);
  }
}

TEST(TunerParse, ThisMachine) {
  const Pressure pressure = ReadPressure();
  EXPECT_GT(pressure.total_bytes, 0u);
  EXPECT_GT(pressure.available_bytes, 0u);
  EXPECT_LE(pressure.available_bytes, pressure.total_bytes);
  EXPECT_LE(pressure.psi_some_avg10, 100);
}

}  // namespace
}  // namespace ksmu::broker
