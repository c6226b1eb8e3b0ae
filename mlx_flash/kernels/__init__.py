"""One door per operation that mlx-flash computes in another way than mlx-lm would.

Each stands beside its plain-MLX reference, and a test holds the two together.
"""
