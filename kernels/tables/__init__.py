"""The launch configurations that ship, one file an architecture, and what was tuned on this machine.

A table is a dictionary: operation → rows, and a row reads

    (bits of an element, M, K, N, largest rank, LaunchConfig)

with M, K and N as ``linear_expand`` has them; where an operation has no N, N is K, and where it has no K
(``expand_backward``), K is N. Of the rows of the element's size, those count that read as the call can
(by TMA or by pointers) and whose rank is the smallest that holds the call's (beyond the
last, the last: the rank is cut into blocks of ``block_r``); of these the nearest in M, K and N.

``TUNED_ON`` names the devices on which a file's rows were measured. Rows of a file without any are
rules: chosen to compile without spilling, within registers and shared memory, to the instructions that
the architecture is fast with. What ``lorafast tune`` measured on this machine (``tuned``) goes first.
"""

from lorafast.kernels.tables.find import find, table_of, tuned_on

__all__ = ["find", "table_of", "tuned_on"]
