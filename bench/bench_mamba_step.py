"""Speed of one token of ``nn.Mamba`` over its matrix products. See bench_selective_scan.py."""

OPS = ("mamba_step",)


def test_speed(benchmark, turn):
    turn.run(benchmark)
