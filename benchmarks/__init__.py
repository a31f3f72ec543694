"""Side-by-side measurements. Each script says in its first lines how to run it."""
