"""How fast and how fair, beside what people would use instead.

The measurements that ``sqla-fairpool bench`` makes a report of, and that
``benchmarks/`` hands to pytest-benchmark. Nothing of the pool needs this.
"""
