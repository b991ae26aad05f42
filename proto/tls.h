// TLS of the gRPC service, with files that can be read again while it runs.
#ifndef SLUICE_PROTO_TLS_H_
#define SLUICE_PROTO_TLS_H_

#include <grpcpp/security/server_credentials.h>

#include <filesystem>
#include <memory>
#include <string>

namespace sluice {

// PEM files. With client_ca only clients whose certificate it has signed are let in.
struct TlsFiles {
  std::filesystem::path certificate, key, client_ca;
};

// What is in them. Throws InputError, naming the file, unless all can be read, the certificates
// parse and the key is the certificate's.
struct TlsIdentity {
  std::string certificate, key, client_ca;
};
TlsIdentity ReadTlsFiles(const TlsFiles& files);

// Credentials of one listening port. New connections get the identity that is set when they begin;
// those that are open keep theirs. Thread-safe.
class ReloadableTls {
 public:
  explicit ReloadableTls(TlsIdentity identity);
  ~ReloadableTls();
  std::shared_ptr<grpc::ServerCredentials> credentials() const;
  // Clients' certificates are asked for as at the beginning.
  void Set(TlsIdentity identity);

 private:
  class Credentials;
  const std::shared_ptr<Credentials> credentials_;
};

}  // namespace sluice

#endif  // SLUICE_PROTO_TLS_H_
