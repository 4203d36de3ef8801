"""A thousand processes on one ledger: the simulation that the tests play as well.

python -m benchmarks.ledger_simulation --processes 1000 --tags 100
"""

from tests.support.ledger_simulation import main

if __name__ == "__main__":
    main()
