"""Which formulation of attention to train with: fused, or written out. Justifies the choice in cil.attention.attend.

    python benchmarks/attention.py [--rounds 15] [--threads 1]

Both in turn in one process; prints median milliseconds and the ratio fused / written out, for each layer at dim 384 with
12 heads, at 64 tokens (batch 128) and 196 tokens (batch 16), forward alone and forward + backward, fp32 and bf16 autocast.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from cil import attention

LAYERS = {"mhsa": attention.SelfAttention, "gpsa": attention.GPSA, "lpa": attention.LPA}


def written_out(q, k, v, bias=None):
    scores = q @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1).to(v.dtype) @ v


def fused(q, k, v, bias=None):
    mask = None if bias is None else bias.to(q.dtype)[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


def seconds(layer, x, backward: bool, bf16: bool) -> float:
    began = time.perf_counter()
    with torch.set_grad_enabled(backward), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = layer(x)
    if backward:
        y.float().sum().backward()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{'layer':6}{'tokens':>7}{'pass':>20}{'dtype':>6}{'fused ms':>10}{'written ms':>11}{'ratio':>7}")
    for name, kind in LAYERS.items():
        for side, batch in ((8, 128), (14, 16)):
            layer, x = kind(384, 12, (side, side)), torch.randn(batch, side * side, 384)
            for backward in (False, True):
                for bf16 in (False, True):
                    times = {fused: [], written_out: []}
                    for turn in range(args.rounds + 2):
                        for variant, taken in times.items():
                            attention.attend = variant
                            taken.append(seconds(layer, x, backward, bf16)) if turn > 1 else seconds(
                                layer, x, backward, bf16
                            )
                    a, b = (1000 * statistics.median(times[v]) for v in (fused, written_out))
                    what = "forward + backward" if backward else "forward"
                    print(
                        f"{name:6}{side**2:>7}{what:>20}{'bf16' if bf16 else 'fp32':>6}{a:>10.1f}{b:>11.1f}{a / b:>7.2f}"
                    )


if __name__ == "__main__":
    main()
