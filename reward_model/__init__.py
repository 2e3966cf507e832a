"""The reward model: trained on the pairs, centred on samples, judged in a report; `scorer` is what others use."""
