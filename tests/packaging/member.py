"""A program that knows nothing of ksmu: 8 MiB in 64 contents, advised as mergeable. Ends when its input does, and has looked at every byte."""
import mmap
import sys

PAGE, PAGES, CONTENTS = mmap.PAGESIZE, 2048, 64
memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
if hasattr(mmap, "MADV_NOHUGEPAGE"):
    memory.madvise(mmap.MADV_NOHUGEPAGE)
contents = [(b"content %d of a member." % i).ljust(32, b".") * (PAGE // 32) for i in range(CONTENTS)]
for page in range(PAGES):
    memory[page * PAGE:(page + 1) * PAGE] = contents[page % CONTENTS]
memory.madvise(mmap.MADV_MERGEABLE if hasattr(mmap, "MADV_MERGEABLE") else 12)
print("advised", flush=True)
sys.stdin.read()
memory[0:1] = b"X"
expected = b"X" + contents[0][1:]
wrong = sum(memory[p * PAGE:(p + 1) * PAGE] != (contents[p % CONTENTS] if p else expected) for p in range(PAGES))
print(f"{wrong} pages wrong", flush=True)
sys.exit(1 if wrong else 0)
