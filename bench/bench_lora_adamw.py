"""Speed of ``optim.LowRankAdamW`` beside its rivals and floors. See bench_selective_scan.py."""

OPS = ("lora_adamw",)


def test_speed(benchmark, turn):
    turn.run(benchmark)
