"""
Prove and time every rung from the plain files to the fast ones.

    python course/all.py                    a quarter of an hour of one core; two for rungs 11 to 13
    python course/all.py --measure=True     and write what was measured, and docs/course.md
    python course/all.py --only=flash       the rungs whose names hold this word
"""
import sys

import measured
import pages
import rung

import configurator
from plaingpt import console
from plaingpt.errors import run

# ------------------------------------------------------------------------------------------------
# Settings
measure: bool = False  # keep what was measured, and write the page
only: str = ''  # part of the names of the rungs; '' takes all
# ------------------------------------------------------------------------------------------------


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    for name in (name for name in rung.NAMES if int(name[:2]) >= rung.FIRST and only in name):
        found = rung.examine(name)
        console.say(rung.described(name, found))
        if measure:
            measured.keep('course', name, found)
    if measure:
        pages.main([])


if __name__ == '__main__':
    run(main)
