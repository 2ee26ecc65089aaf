"""HTTP: from requests to the gateway, and from its results to responses."""
