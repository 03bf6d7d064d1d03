"""Speed of ``dora_linear`` beside its rivals and floors. See bench_selective_scan.py."""

OPS = ("dora_linear",)


def test_speed(benchmark, turn):
    turn.run(benchmark)
