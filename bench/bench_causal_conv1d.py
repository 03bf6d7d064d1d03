"""Speed of ``causal_conv1d`` beside its rivals and floors. See bench_selective_scan.py."""

OPS = ("causal_conv1d",)


def test_speed(benchmark, turn):
    turn.run(benchmark)
