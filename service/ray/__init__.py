"""The gateway as an application of Ray Serve; needs the extra `ray`."""
