"""One model over several ranks: who holds which weights, how results are summed, who leads.

Rank 0 tells the others what to run; everything here is the same code on every rank but for that.
Knows nothing of requests, of workers or of how commands travel.
"""
