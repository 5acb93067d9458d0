"""My Jamba: a hybrid of Mamba, attention and a mixture of experts, which loads and runs a trained checkpoint.

Axes: b batch, t time, s time of the keys, d model width, c inner channels, n state, r rank of delta, w width of the
convolution, h query heads, g key/value heads, p width of a head, e experts, k experts a token, f feed-forward width,
v vocabulary.

Read in this order: scan, router, attention, mixer, block, model.
"""
