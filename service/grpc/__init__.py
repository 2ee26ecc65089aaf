"""Open Inference over gRPC, and how all our gRPC servers listen."""
