"""Runs Python's own tests, for programs_test.py: python_tests.py RESULTS NAME...

A NAME is a module, a class or a test. RESULTS gets a line for each test: its name, and ok, failed or skipped; the last
line says that the end was reached. The tests of Python have few equal pages: so there is memory beside them that has,
and some of it is written and all of it looked at between two tests.
"""
import mmap
import random
import sys
import unittest

PAGE, PAGES = 4096, 4096


class Ballast:
    def __init__(self):
        self.memory = mmap.mmap(-1, PAGE * PAGES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.chance = random.Random(3)  # not what the tests draw from
        self.contents = [bytes([65 + n]) * PAGE for n in range(7)]
        self.held = [0] * PAGES
        for page in range(PAGES):
            self.write(page)

    def write(self, page):
        self.held[page] = self.chance.randrange(7)
        self.memory[page * PAGE:(page + 1) * PAGE] = self.contents[self.held[page]]

    def turn(self):
        for page in range(PAGES):
            if self.memory[page * PAGE:(page + 1) * PAGE] != self.contents[self.held[page]]:
                print(f"page {page} of the ballast holds something else", flush=True)
                sys.exit(3)
        for _ in range(40):
            self.write(self.chance.randrange(PAGES))


class Result(unittest.TextTestResult):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.found, self.ballast = {}, Ballast()

    def note(self, test, what):
        if self.found.get(test.id()) != "failed":
            self.found[test.id()] = what

    def stopTest(self, test):
        super().stopTest(test)
        self.ballast.turn()

    def addSuccess(self, test):
        super().addSuccess(test)
        self.note(test, "ok")

    def addExpectedFailure(self, test, error):
        super().addExpectedFailure(test, error)
        self.note(test, "ok")

    def addSkip(self, test, why):
        super().addSkip(test, why)
        self.note(test, "skipped")

    def addError(self, test, error):
        super().addError(test, error)
        self.note(test, "failed")

    def addFailure(self, test, error):
        super().addFailure(test, error)
        self.note(test, "failed")

    def addUnexpectedSuccess(self, test):
        super().addUnexpectedSuccess(test)
        self.note(test, "failed")

    def addSubTest(self, test, part, error):
        super().addSubTest(test, part, error)
        if error:
            self.note(test, "failed")


def main():
    suite = unittest.defaultTestLoader.loadTestsFromNames(sys.argv[2:])
    result = unittest.TextTestRunner(resultclass=Result, verbosity=0).run(suite)
    with open(sys.argv[1], "w") as f:
        for name, what in result.found.items():
            f.write(f"{name.replace(chr(10), ' ')} {what}\n")
        f.write("end ok\n")


if __name__ == "__main__":
    main()
