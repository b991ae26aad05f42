#!/usr/bin/env python3
"""Lists what a gRPC server offers and calls one of its methods, by reflection alone: no .proto file
and no generated code, as grpcurl does.

    python3 reflect.py localhost:50051
    python3 reflect.py localhost:50051 sluice.v1.Sluice/GetModel '{}'
"""

import argparse

import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("server")
    parser.add_argument("method", nargs="?", help="SERVICE/METHOD")
    parser.add_argument("request", nargs="?", default="{}", help="in JSON")
    parser.add_argument("--token")
    arguments = parser.parse_args()

    with grpc.insecure_channel(arguments.server) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = descriptor_pool.DescriptorPool(database)
        if not arguments.method:
            for name in database.get_services():
                print(name)
                try:
                    methods = pool.FindServiceByName(name).methods
                except KeyError:  # a service that is named but not described
                    methods = []
                for method in methods:
                    print(f"  {method.name}({method.input_type.full_name}) -> "
                          f"{method.output_type.full_name}")
            return
        service, _, name = arguments.method.partition("/")
        method = pool.FindServiceByName(service).FindMethodByName(name)
        factory = message_factory.MessageFactory(pool)
        make = getattr(message_factory, "GetMessageClass", factory.GetPrototype
                       if hasattr(factory, "GetPrototype") else None)
        request_type, response_type = make(method.input_type), make(method.output_type)
        call = channel.unary_stream(f"/{service}/{name}",
                                    request_serializer=request_type.SerializeToString,
                                    response_deserializer=response_type.FromString)
        metadata = [("authorization", f"Bearer {arguments.token}")] if arguments.token else None
        for response in call(json_format.Parse(arguments.request, request_type()),
                             metadata=metadata):
            print(json_format.MessageToJson(response, preserving_proto_field_name=True))


if __name__ == "__main__":
    main()
