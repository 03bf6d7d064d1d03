"""Speed of ``lora_linear`` beside its rivals and floors. See bench_selective_scan.py."""

OPS = ("lora_linear",)


def test_speed(benchmark, turn):
    turn.run(benchmark)
