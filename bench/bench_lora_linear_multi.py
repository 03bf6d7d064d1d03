"""Speed of ``lora_linear_multi`` beside its rivals and floors. See bench_selective_scan.py."""

OPS = ("lora_linear_multi",)


def test_speed(benchmark, turn):
    turn.run(benchmark)
