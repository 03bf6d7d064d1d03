"""Speed of ``lora_merge_`` and ``lora_swap_`` beside their rivals and floors. See bench_selective_scan.py."""

OPS = ("lora_merge_", "lora_swap_")


def test_speed(benchmark, turn):
    turn.run(benchmark)
