"""Studies of attacks, defences and tuning strategies, as recipes describe them."""
