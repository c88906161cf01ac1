"""Ray: engines over several machines, and replicas of a server behind one address."""
