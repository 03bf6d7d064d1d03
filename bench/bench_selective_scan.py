"""Speed of ``selective_scan`` beside its rivals and floors.

Each test is one block of rounds of one contender; see ``trifuse.report.arena`` for how blocks are
interleaved, and ``trifuse/report/subjects/selective_scan.py`` for what is measured. A contender that
does not match the float64 reference fails here and is not timed.
"""

OPS = ("selective_scan",)


def test_speed(benchmark, turn):
    turn.run(benchmark)
