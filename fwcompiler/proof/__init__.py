"""What a policy and a ruleset mean, for packets: pure functions, no compiler, no kernel."""
