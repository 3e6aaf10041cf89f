"""
Prove and time every rung from the plain files to the fast ones.

    python course/all.py                    half an hour: one core, and two for rungs 11 to 13
    python course/all.py --measure=True     and write what was measured, and docs/course.md
    python course/all.py --only=flash       the rungs whose names hold this word, or one of several: --only=rope,muon
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
only: str = ''  # words, with commas between, that the names of the rungs hold; '' takes all
# ------------------------------------------------------------------------------------------------


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    wanted = [name for name in rung.NAMES if any(word in name for word in only.split(','))]
    for name in (name for name in wanted if int(name[:2]) >= rung.FIRST):
        found = rung.examine(name)
        console.say(rung.described(name, found))
        if measure:
            measured.keep('course', name, found)
    if measure:
        pages.main([])


if __name__ == '__main__':
    run(main)
