"""Speed of transformers' models with and without trifuse. See bench_selective_scan.py."""

OPS = ("transformers",)


def test_speed(benchmark, turn):
    turn.run(benchmark)
