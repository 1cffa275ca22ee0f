"""Programs run under many seeds: what is found wrong under some, or under each."""

from ptx.handwritten import fault_of, launch

SEEDS = range(20)


def lines(text, code):
    """The lines of a kernel in which a piece of code stands."""
    return [i for i, line in enumerate(text.split("\n"), 1) if code in line]


def faults(text, make, **options):
    """What is said under the seeds that find something wrong."""
    said = [fault_of(lambda: launch(text, make(), seed=seed, **options)) for seed in SEEDS]  # noqa: B023
    return [fault for fault in said if fault]


def always(text, make, **options):
    """The same of what is found wrong under every seed."""
    found = faults(text, make, **options)
    assert len(found) == len(SEEDS)
    return found
