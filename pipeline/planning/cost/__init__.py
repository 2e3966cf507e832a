"""What a run will cost: what each job does, how fast this machine is, the table before the first stage."""
