// What `sluice serve` may be told: by flags or by one JSON file, with the same names
// ("--max-streams" is "max_streams"). Tokens come in the file alone.
#ifndef SLUICE_PROTO_SERVER_CONFIG_H_
#define SLUICE_PROTO_SERVER_CONFIG_H_

#include <filesystem>
#include <string>
#include <variant>
#include <vector>

#include "proto/service.h"

namespace sluice {

struct ServerConfig {
  std::string model;                // empty: the bundled one
  std::string dtype;                // "f32", "bf16"; empty: bf16
  int threads = 0;                  // 0: physical cores
  std::string device;               // "cpu", "cuda"; empty: a GPU if there is one
  std::string weights;              // "bf16", "fp8", "int8"; empty: bf16
  std::string attention = "exact";  // or "sage", or a file by sluice calibrate
  int64_t kv_mb = 0;                // of all streams together; 0: by memory_defaults.h
  int64_t stream_kv_mb = 0;
  int64_t stream_host_mb = -1;  // -1: by memory_defaults.h
  int64_t stream_disk_mb = 0;
  std::string memory_directory, state_directory;
  int saved_streams = 0, all_saved_streams = 0;
  int64_t saved_mb = 0, all_saved_mb = 0;
  std::string metrics = "127.0.0.1:9464";  // empty: none
  int64_t max_message_mb = 8;
  int64_t outgoing_kb = 1024;
  int64_t network_mb = 512;
  int64_t queued_picture_mb = 0;  // of all streams together; 0: by memory_defaults.h
  int max_sources = -1;           // -1: by memory_defaults.h
  std::string certificate, key, client_ca;
  std::vector<std::string> source_directories;
  std::string source_decoder;                 // empty: beside the program
  std::string source_isolation = "required";  // or "off"
  int64_t source_memory_mb = 1024;
  bool tokens_given = false;   // the file has a list of them, perhaps an empty one
  SchedulerOptions scheduler;  // its queued_bytes are set by WithMemory
  ServiceOptions service;      // its paths and sizes are set by Finish
};

struct Setting {
  std::string name;  // as in the file
  std::string help;
  std::variant<std::string*, int*, int64_t*, double*, bool*, std::vector<std::string>*> value;
};
// All of them, pointing into `config`.
std::vector<Setting> SettingsOf(ServerConfig& config);

// Sets what the file tells. Throws InputError in one line naming the file, and for an unknown name
// the nearest known one.
void ReadServerConfig(const std::filesystem::path& file, ServerConfig& config);

// The same with the shares of the memory that is there in place of what is left open.
// On a GPU keys and values lie in its memory, not in this.
ServerConfig WithMemory(ServerConfig config, int64_t memory_bytes, int64_t weight_bytes, bool gpu);

// The service's options with everything in place. Throws InputError on values out of range, and as
// CheckExposure on what must be said to be meant.
ServiceOptions Finished(const ServerConfig& config);

}  // namespace sluice

#endif  // SLUICE_PROTO_SERVER_CONFIG_H_
