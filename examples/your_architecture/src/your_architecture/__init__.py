"""What a package of your own can add to mlx-flash without touching it."""
