"""Hostile containers: processes that interfere with restores while the kernel lets them.

`python -m tests.attackers --seconds S` runs each attack for S seconds against one restore after
another, and checks that nothing outside the mount was touched and no wrong descriptor delivered.
"""
