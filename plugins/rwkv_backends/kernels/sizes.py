"""Sizes of grids and of tiles. Triton's functions of these names take ten times as long where the host calls them."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least that is not below n, from 1 on."""
    return 1 << (n - 1).bit_length()
