"""Speed of ``causal_conv1d_update`` beside its rivals and floors. See bench_selective_scan.py."""

OPS = ("causal_conv1d_update",)


def test_speed(benchmark, turn):
    turn.run(benchmark)
