"""How a gRPC server of ours listens."""

import grpc


async def listening(
    handler: grpc.GenericRpcHandler, host: str, port: int | None, max_message_bytes: int
) -> grpc.aio.Server:
    """Return a server that has started to listen on a port, which must be set.

    Raises:
        RuntimeError: the port is not available.
    """
    options = [("grpc.max_receive_message_length", max_message_bytes), ("grpc.so_reuseport", 0)]
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    await server.start()
    return server
