"""Speed of ``gmm_attention_step`` beside its rivals and floors. See bench_selective_scan.py."""

OPS = ("gmm_attention_step",)


def test_speed(benchmark, turn):
    turn.run(benchmark)
