#include "proto/tls.h"

#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <fstream>
#include <mutex>
#include <optional>
#include <sstream>
#include <utility>

#include "runtime/error.h"

namespace sluice {
namespace {

std::string ReadPem(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::stringstream text;
  text << in.rdbuf();
  if (!in || text.str().empty()) {
    throw InputError("[serve] expected a PEM file at " + path.string() + ", cannot read one");
  }
  return text.str();
}

template <typename T, void (*kFree)(T*)>
struct Free {
  void operator()(T* object) const { kFree(object); }
};
using Certificate = std::unique_ptr<X509, Free<X509, X509_free>>;
using Key = std::unique_ptr<EVP_PKEY, Free<EVP_PKEY, EVP_PKEY_free>>;
struct FreeBio {
  void operator()(BIO* bio) const { BIO_free(bio); }
};

std::unique_ptr<BIO, FreeBio> Reader(const std::string& pem) {
  return std::unique_ptr<BIO, FreeBio>(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
}

Certificate ParseCertificate(const std::filesystem::path& path, const std::string& pem) {
  Certificate certificate(PEM_read_bio_X509(Reader(pem).get(), nullptr, nullptr, nullptr));
  if (!certificate) {
    throw InputError("[serve] expected a certificate in PEM in " + path.string() + ", found none");
  }
  return certificate;
}

}  // namespace

TlsIdentity ReadTlsFiles(const TlsFiles& files) {
  TlsIdentity identity{.certificate = ReadPem(files.certificate),
                       .key = ReadPem(files.key),
                       .client_ca = files.client_ca.empty() ? "" : ReadPem(files.client_ca)};
  const Certificate certificate = ParseCertificate(files.certificate, identity.certificate);
  // Without a password: nobody is there to be asked for one.
  char none[] = "";
  const Key key(PEM_read_bio_PrivateKey(Reader(identity.key).get(), nullptr, nullptr, none));
  if (!key) {
    throw InputError("[serve] expected a private key in PEM, without a password, in " +
                     files.key.string() + ", found none");
  }
  if (X509_check_private_key(certificate.get(), key.get()) != 1) {
    throw InputError("[serve] the key in " + files.key.string() + " is not that of " +
                     files.certificate.string());
  }
  if (!identity.client_ca.empty()) ParseCertificate(files.client_ca, identity.client_ca);
  return identity;
}

// The C interface of gRPC asks for the identity at every handshake; the C++ one cannot.
class ReloadableTls::Credentials final : public grpc::ServerCredentials {
 public:
  explicit Credentials(TlsIdentity identity) : next_(std::move(identity)) {
    const auto request = next_->client_ca.empty()
                             ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                             : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY;
    // Takes the options over.
    credentials_ = grpc_ssl_server_credentials_create_with_options(
        grpc_ssl_server_credentials_create_options_using_config_fetcher(request, &Fetch, this));
  }
  ~Credentials() override { grpc_server_credentials_release(credentials_); }

  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {
    throw Error("[tls] expected no metadata processor: tokens are looked at where calls begin");
  }
  void Set(TlsIdentity identity) {
    const std::lock_guard lock(mutex_);
    next_ = std::move(identity);
  }

 private:
  int AddPortToServer(const std::string& address, grpc_server* server) override {
    return grpc_server_add_http2_port(server, address.c_str(), credentials_);
  }

  static grpc_ssl_certificate_config_reload_status Fetch(
      void* self, grpc_ssl_server_certificate_config** config) {
    auto& credentials = *static_cast<Credentials*>(self);
    const std::lock_guard lock(credentials.mutex_);
    const auto next = std::exchange(credentials.next_, std::nullopt);
    if (!next) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
    const grpc_ssl_pem_key_cert_pair pair = {.private_key = next->key.c_str(),
                                             .cert_chain = next->certificate.c_str()};
    // gRPC wants an authority even where it asks for no client's certificate, and then uses none.
    const std::string& authority = next->client_ca.empty() ? next->certificate : next->client_ca;
    *config = grpc_ssl_server_certificate_config_create(authority.c_str(), &pair, 1);
    return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
  }

  std::mutex mutex_;
  std::optional<TlsIdentity> next_;  // not yet taken by gRPC
  grpc_server_credentials* credentials_ = nullptr;
};

ReloadableTls::ReloadableTls(TlsIdentity identity)
    : credentials_(std::make_shared<Credentials>(std::move(identity))) {}

ReloadableTls::~ReloadableTls() = default;

std::shared_ptr<grpc::ServerCredentials> ReloadableTls::credentials() const { return credentials_; }

void ReloadableTls::Set(TlsIdentity identity) { credentials_->Set(std::move(identity)); }

}  // namespace sluice
