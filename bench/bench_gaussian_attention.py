"""Speed of ``gaussian_attention`` beside its rivals and floors. See bench_selective_scan.py."""

OPS = ("gaussian_attention",)


def test_speed(benchmark, turn):
    turn.run(benchmark)
