"""DPO on the pairs of a run, by TRL, with the reference's log-probabilities kept between runs."""
