"""The score interval of a rate, found as its definition says."""

import scipy.optimize


def score_interval(rate, trials, z=1.959964):
    """Returns the rates that lie z of their own standard errors below and above what was seen of `trials`."""

    def excess(p):
        return (rate - p) ** 2 * trials - z**2 * p * (1 - p)

    return scipy.optimize.brentq(excess, 0.0, rate), scipy.optimize.brentq(excess, rate, 1.0)
