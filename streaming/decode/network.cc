#include "streaming/decode/network.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gio/gio.h>
#include <netinet/in.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>

#include "streaming/apart/wire.h"
#include "streaming/connection_check.h"

namespace sluice::decode {
namespace {

using apart::Dial;
using apart::DialReply;

DialReply Ask(const Dial& dial, apart::UniqueFd* connection) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  DialReply reply = {};
  if (!apart::Send(apart::kDialFd, dial) ||
      !apart::Receive(apart::kDialFd, reply, apart::Waiting::kWait, connection)) {
    reply.error = ECONNABORTED;
  }
  return reply;
}

// GLib holds one resolver for the process.
struct Pinned {
  std::string host;
  std::vector<std::string> addresses;
};
Pinned& TheHost() {
  static Pinned host;
  return host;
}

// Of the connection that was asked for last.
struct LastConnection {
  std::mutex mutex;
  std::string place;
  int error = 0;
};
LastConnection& TheLast() {
  static LastConnection last;
  return last;
}
void NoteConnection(const std::string& place, int error) {
  LastConnection& last = TheLast();
  const std::lock_guard lock(last.mutex);
  last.place = place;
  last.error = error;
}

// The addresses of a name as GLib's list; null and `error` if there is none.
GList* Resolve(const gchar* name, GResolverNameLookupFlags flags, GError** error) {
  std::vector<std::string> found;
  if (!TheHost().host.empty() && g_ascii_strcasecmp(name, TheHost().host.c_str()) == 0) {
    found = TheHost().addresses;
  } else {
    Dial dial = {};
    dial.kind = Dial::Kind::kResolve;
    apart::SetText(dial.text, name);
    const DialReply reply = Ask(dial, nullptr);
    for (uint32_t i = 0; i < std::min(reply.count, DialReply::kMaxAddresses); ++i) {
      found.push_back(apart::TextOf(reply.addresses[i]));
    }
  }
  GList* list = nullptr;
  for (const std::string& text : found) {
    GInetAddress* address = g_inet_address_new_from_string(text.c_str());
    if (!address) continue;
    const GSocketFamily family = g_inet_address_get_family(address);
    const bool wanted =
        !((flags & G_RESOLVER_NAME_LOOKUP_FLAGS_IPV4_ONLY) && family != G_SOCKET_FAMILY_IPV4) &&
        !((flags & G_RESOLVER_NAME_LOOKUP_FLAGS_IPV6_ONLY) && family != G_SOCKET_FAMILY_IPV6);
    if (wanted) {
      list = g_list_append(list, address);
    } else {
      g_object_unref(address);
    }
  }
  if (!list) {
    g_set_error(error, G_RESOLVER_ERROR, G_RESOLVER_ERROR_NOT_FOUND,
                "host '%s': this server's rules do not allow it or it has no address", name);
  }
  return list;
}

struct AskedResolver {
  GResolver parent;
};
struct AskedResolverClass {
  GResolverClass parent;
};
G_DEFINE_TYPE(AskedResolver, asked_resolver, G_TYPE_RESOLVER)

void asked_resolver_init(AskedResolver*) {}
void FreeAddresses(gpointer list) { g_resolver_free_addresses(static_cast<GList*>(list)); }
void ResolveAsync(GResolver* self, const gchar* name, GResolverNameLookupFlags flags,
                  GCancellable* cancellable, GAsyncReadyCallback callback, gpointer data) {
  GTask* task = g_task_new(self, cancellable, callback, data);
  GError* error = nullptr;
  if (GList* list = Resolve(name, flags, &error)) {
    g_task_return_pointer(task, list, FreeAddresses);
  } else {
    g_task_return_error(task, error);
  }
  g_object_unref(task);
}
GList* Finish(GResolver*, GAsyncResult* result, GError** error) {
  return static_cast<GList*>(g_task_propagate_pointer(G_TASK(result), error));
}

void asked_resolver_class_init(AskedResolverClass* type) {
  GResolverClass* resolver = &type->parent;
  resolver->lookup_by_name = [](GResolver*, const gchar* name, GCancellable*, GError** error) {
    return Resolve(name, G_RESOLVER_NAME_LOOKUP_FLAGS_DEFAULT, error);
  };
  resolver->lookup_by_name_async = [](GResolver* self, const gchar* name, GCancellable* cancellable,
                                      GAsyncReadyCallback callback, gpointer data) {
    ResolveAsync(self, name, G_RESOLVER_NAME_LOOKUP_FLAGS_DEFAULT, cancellable, callback, data);
  };
  resolver->lookup_by_name_finish = Finish;
  resolver->lookup_by_name_with_flags = [](GResolver*, const gchar* name,
                                           GResolverNameLookupFlags flags, GCancellable*,
                                           GError** error) { return Resolve(name, flags, error); };
  resolver->lookup_by_name_with_flags_async = ResolveAsync;
  resolver->lookup_by_name_with_flags_finish = Finish;
}

}  // namespace

void UseAskedNetwork(const std::string& host, std::vector<std::string> addresses) {
  setenv("GIO_USE_PROXY_RESOLVER", "dummy", 1);
  setenv("GIO_USE_NETWORK_MONITOR", "base", 1);
  setenv("GIO_USE_VFS", "local", 1);
  setenv("GSETTINGS_BACKEND", "memory", 1);
  TheHost() = {host, std::move(addresses)};
  GResolver* resolver = G_RESOLVER(g_object_new(asked_resolver_get_type(), nullptr));
  g_resolver_set_default(resolver);
  g_object_unref(resolver);
  g_proxy_resolver_get_default();
  g_network_monitor_get_default();
  // The authorities that certificates are checked against are read once, here.
  GTlsDatabase* trusted = g_tls_backend_get_default_database(g_tls_backend_get_default());
  if (trusted) g_object_unref(trusted);
}

int AskedConnect(int socket, const sockaddr* address, socklen_t size) {
  Dial dial = {};
  dial.kind = Dial::Kind::kConnect;
  if (address->sa_family == AF_INET && size >= sizeof(sockaddr_in)) {
    const auto* four = reinterpret_cast<const sockaddr_in*>(address);
    dial.port = ntohs(four->sin_port);
    inet_ntop(AF_INET, &four->sin_addr, dial.text, sizeof dial.text);
  } else if (address->sa_family == AF_INET6 && size >= sizeof(sockaddr_in6)) {
    const auto* six = reinterpret_cast<const sockaddr_in6*>(address);
    dial.port = ntohs(six->sin6_port);
    inet_ntop(AF_INET6, &six->sin6_addr, dial.text, sizeof dial.text);
  } else {
    errno = EACCES;
    return -1;
  }
  const Pinned& pinned = TheHost();
  const bool is_pinned = std::find(pinned.addresses.begin(), pinned.addresses.end(), dial.text) !=
                         pinned.addresses.end();
  const std::string place = (is_pinned ? pinned.host : dial.text) + ":" + std::to_string(dial.port);
  NoteConnection(place, ETIMEDOUT);  // if nobody waits for its end
  apart::UniqueFd connection;
  const DialReply reply = Ask(dial, &connection);
  NoteConnection(place, reply.error);
  if (reply.error != 0 || !connection) {
    errno = reply.error != 0 ? reply.error : ECONNABORTED;
    return -1;
  }
  const int flags = fcntl(socket, F_GETFL);
  if (flags < 0 || fcntl(connection.get(), F_SETFL, flags) != 0 ||
      dup3(connection.get(), socket, O_CLOEXEC) < 0) {
    return -1;
  }
  return 0;
}

std::string WhyNotConnected() {
  LastConnection& last = TheLast();
  const std::lock_guard lock(last.mutex);
  if (last.error == EACCES) return "connecting to " + last.place + " is not allowed";
  return last.error == 0 ? "" : MeaningOfConnectError(last.error, last.place);
}

}  // namespace sluice::decode
