"""The fault zoo: engines and model files that are wrong in one named way, held against the judge.

`python -m tests.zoo` prints the table. What plants the faults shares no operation with the judge.
"""
