"""What goes wrong on the way to a cluster, said without importing Ray."""


class DeploymentError(ValueError):
    """A mistake in what was asked of a deployment, or a cluster that refuses it; one sentence."""
