"""Written by `python -m build_defs.variant_lists`: the variants that are built ahead of time, by kernel."""

VARIANTS = {
    "down_projection": [
        "sonicmoe.down_projection-bias.false-dtype.bfloat16-tile.m128n128pp2c2s5",
        "sonicmoe.down_projection-bias.false-dtype.bfloat16-tile.m128n192pp2c1s4",
        "sonicmoe.down_projection-bias.false-dtype.bfloat16-tile.m192n256co3c1s3",
    ],
    "up_projection": [
        "sonicmoe.up_projection-activation.swiglu-bias.false-dtype.bfloat16-interleaved.false-store_z.false-tile.m192n256co3c1s3",
        "sonicmoe.up_projection-activation.swiglu-bias.false-dtype.bfloat16-interleaved.false-store_z.false-tile.m192n256co3c2s3",
        "sonicmoe.up_projection-activation.swiglu-bias.false-dtype.bfloat16-interleaved.false-store_z.true-tile.m192n256co3c1s3",
        "sonicmoe.up_projection-activation.swiglu-bias.false-dtype.bfloat16-interleaved.false-store_z.true-tile.m192n256co3c2s3",
        "sonicmoe.up_projection-activation.swiglu-bias.false-dtype.bfloat16-interleaved.true-store_z.false-tile.m192n256co3c1s3",
        "sonicmoe.up_projection-activation.swiglu-bias.false-dtype.bfloat16-interleaved.true-store_z.false-tile.m192n256co3c2s3",
        "sonicmoe.up_projection-activation.swiglu-bias.false-dtype.bfloat16-interleaved.true-store_z.true-tile.m192n256co3c1s3",
        "sonicmoe.up_projection-activation.swiglu-bias.false-dtype.bfloat16-interleaved.true-store_z.true-tile.m192n256co3c2s3",
    ],
}
