"""Speed of ``gaussian_adaptive_attention`` beside its rivals and floors. See bench_selective_scan.py."""

OPS = ("gaussian_adaptive_attention",)


def test_speed(benchmark, turn):
    turn.run(benchmark)
