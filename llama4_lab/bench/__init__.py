"""``llama4-lab bench``: a seeded full-size model on the GPU at hand, beside what it could reach.

`run` holds the stages; `layers` times one MoE layer, `steps` the whole model; `weights` seeds them.
Rooflines come from `llama4_lab.plan` with the copy bandwidth and matrix rate of the same run.
"""
