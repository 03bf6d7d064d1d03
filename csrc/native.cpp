// trifuse._native: facts of this build, and control of the CPU's instruction set.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <string>
#include <thread>
#include <vector>

namespace py = pybind11;

extern "C" {
const char* trifuse_cpu_isa();
const char* trifuse_cpu_supported_isa(int i);
bool trifuse_cpu_set_isa(const char* name);
float trifuse_cpu_exp_floor(int64_t n);
}

namespace {

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  while (const char* name = trifuse_cpu_supported_isa(int(names.size()))) names.emplace_back(name);
  return names;
}

void set_cpu_isa(const std::string& name) {
  if (trifuse_cpu_set_isa(name.c_str())) return;
  std::string known;
  for (const std::string& isa : cpu_isas()) known += (known.empty() ? "" : ", ") + isa;
  throw py::value_error("set_cpu_isa: this machine and build have no '" + name + "'; choose one of " + known);
}

double exp_floor(int64_t n, int threads) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<float> sums(threads > 0 ? threads : 1);
  std::vector<std::thread> pool;
  for (size_t i = 1; i < sums.size(); ++i) {
    pool.emplace_back([&, i] { sums[i] = trifuse_cpu_exp_floor(n / int64_t(sums.size())); });
  }
  sums[0] = trifuse_cpu_exp_floor(n / int64_t(sums.size()));
  for (std::thread& thread : pool) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = TRIFUSE_COMPILER;
  info["torch"] = TRIFUSE_TORCH_VERSION;
  info["cuda"] = TRIFUSE_CUDA_FACT;
  info["cuda_architectures"] = TRIFUSE_CUDA_ARCHITECTURES;
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Facts of this build, and control of the CPU's instruction set.";
  m.def("build_info", &build_info, "Compiler, torch headers and CUDA this installation was built with.");
  m.def("cpu_isas", &cpu_isas, "Instruction sets that this machine and this build have, best first.");
  m.def("cpu_isa", &trifuse_cpu_isa, "The instruction set in use.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"), "Use another of cpu_isas() from the next call on.");
  m.def("exp_floor", &exp_floor, py::arg("n"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
        "Seconds for n float32 exponentials in a tight vector loop, computed as the kernels do.");
}
