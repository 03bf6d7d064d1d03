"""Speed of ``nested_linear`` beside its rivals and floors. See bench_selective_scan.py."""

OPS = ("nested_linear",)


def test_speed(benchmark, turn):
    turn.run(benchmark)
