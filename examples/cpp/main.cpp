// Energy, forces and charges of a molecule or a crystal from a compiled model, with LibTorch alone.
//
//   energy MODEL.jpt FILE.xyz [--charge Q] [--mult M] [--double] [--cuda]
//
// Reads the first frame of an XYZ file; a Lattice="..." in its comment line (extended XYZ) makes it periodic. Prints
// energy (eV), forces (eV/Å), charges (e), and the stress (eV/Å³) if the model gives one. A mistake ends with one line
// on stderr and exit status 2.

#include <torch/csrc/jit/runtime/jit_exception.h>
#include <torch/cuda.h>
#include <torch/script.h>

#include <array>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// Element symbols by atomic number, as far as any model goes.
const std::vector<std::string> SYMBOLS = {
    "X",  "H",  "He", "Li", "Be", "B",  "C",  "N",  "O",  "F",  "Ne", "Na", "Mg", "Al", "Si", "P",  "S",  "Cl",
    "Ar", "K",  "Ca", "Sc", "Ti", "V",  "Cr", "Mn", "Fe", "Co", "Ni", "Cu", "Zn", "Ga", "Ge", "As", "Se", "Br",
    "Kr", "Rb", "Sr", "Y",  "Zr", "Nb", "Mo", "Tc", "Ru", "Rh", "Pd", "Ag", "Cd", "In", "Sn", "Sb", "Te", "I",
    "Xe", "Cs", "Ba", "La", "Ce", "Pr", "Nd", "Pm", "Sm", "Eu", "Gd", "Tb", "Dy", "Ho", "Er", "Tm", "Yb", "Lu",
    "Hf", "Ta", "W",  "Re", "Os", "Ir", "Pt", "Au", "Hg", "Tl", "Pb", "Bi", "Po", "At", "Rn"};

using Batch = c10::Dict<std::string, torch::Tensor>;

struct Options {
  std::string model, xyz;
  double charge = 0.0, mult = 1.0;
  torch::ScalarType dtype = torch::kFloat32;
  torch::Device device = torch::kCPU;
};

struct Structure {
  std::vector<int64_t> numbers;
  std::vector<double> coord;  // x, y, z of each atom, Å
  std::vector<double> cell;   // nine numbers, Å, rows are lattice vectors; empty for a molecule
};

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

double number(const std::string& option, const std::string& text) {
  std::istringstream stream(text);
  double value = 0.0;
  if (!(stream >> value) || !stream.eof()) fail(option + ": '" + text + "' is not a number");
  return value;
}

Options parse(int argc, char** argv) {
  Options options;
  std::vector<std::string> files;
  for (int k = 1; k < argc; ++k) {
    const std::string word = argv[k];
    if (word == "--charge" || word == "--mult") {
      if (k + 1 == argc) fail(word + " needs a number");
      (word == "--charge" ? options.charge : options.mult) = number(word, argv[++k]);
    } else if (word == "--double") {
      options.dtype = torch::kFloat64;
    } else if (word == "--cuda") {
      options.device = torch::kCUDA;
    } else if (word.rfind("--", 0) == 0) {
      fail(word + " is not one of --charge, --mult, --double, --cuda");
    } else {
      files.push_back(word);
    }
  }
  if (files.size() != 2) fail("usage: energy MODEL.jpt FILE.xyz [--charge Q] [--mult M] [--double] [--cuda]");
  options.model = files[0];
  options.xyz = files[1];
  return options;
}

int64_t atomic_number(const std::string& symbol) {
  for (size_t z = 1; z < SYMBOLS.size(); ++z) {
    if (SYMBOLS[z] == symbol) return static_cast<int64_t>(z);
  }
  fail("'" + symbol + "' is not the symbol of an element");
}

Structure read_xyz(const std::string& path) {
  std::ifstream file(path);
  if (!file) fail(path + ": no such file");
  std::string line;
  long n_atoms = 0;
  if (!std::getline(file, line) || !(std::istringstream(line) >> n_atoms) || n_atoms < 1) {
    fail(path + ": the first line must be the number of atoms");
  }
  Structure structure;
  if (!std::getline(file, line)) fail(path + ": the comment line is missing");
  const auto lattice = line.find("Lattice=\"");
  if (lattice != std::string::npos) {
    std::istringstream values(line.substr(lattice + 9, line.find('"', lattice + 9) - lattice - 9));
    for (double value; values >> value;) structure.cell.push_back(value);
    if (structure.cell.size() != 9) fail(path + ": Lattice must hold nine numbers");
  }
  for (long i = 0; i < n_atoms; ++i) {
    std::string symbol;
    std::array<double, 3> r{};
    if (!std::getline(file, line) || !(std::istringstream(line) >> symbol >> r[0] >> r[1] >> r[2])) {
      fail(path + ": atom " + std::to_string(i + 1) + " of " + std::to_string(n_atoms) +
           " must be a line with a symbol and three coordinates");
    }
    structure.numbers.push_back(atomic_number(symbol));
    structure.coord.insert(structure.coord.end(), r.begin(), r.end());
  }
  return structure;
}

// The model's input, a dictionary of tensors: one molecule in flat layout, coord (N, 3) and numbers (N).
Batch make_batch(const Structure& structure, const Options& options) {
  const auto n_atoms = static_cast<int64_t>(structure.numbers.size());
  Batch batch;
  // from_blob does not own its memory; to(...) with copy = true makes tensors that do.
  const auto floats = [&](const std::vector<double>& values, std::vector<int64_t> shape) {
    auto view = torch::from_blob(const_cast<double*>(values.data()), shape, torch::kFloat64);
    return view.to(options.device, options.dtype, /*non_blocking=*/false, /*copy=*/true);
  };
  batch.insert("coord", floats(structure.coord, {n_atoms, 3}));
  batch.insert("numbers", torch::tensor(structure.numbers, torch::kInt64).to(options.device));
  batch.insert("charge", floats({options.charge}, {1}));
  batch.insert("mult", floats({options.mult}, {1}));
  if (!structure.cell.empty()) batch.insert("cell", floats(structure.cell, {3, 3}));
  return batch;
}

void print_rows(const char* name, const char* unit, const torch::Tensor& values) {
  std::printf("%s %s\n", name, unit);
  const auto rows = values.to(torch::kCPU, torch::kFloat64).reshape({values.size(0), -1}).contiguous();
  const auto* x = rows.data_ptr<double>();
  for (int64_t i = 0; i < rows.size(0); ++i) {
    // 17 digits tell every float64 from every other one.
    for (int64_t k = 0; k < rows.size(1); ++k) std::printf(k == 0 ? "%.17g" : " %.17g", *x++);
    std::printf("\n");
  }
}

std::string first_line(const std::string& message) { return message.substr(0, message.find('\n')); }

// What the model refused, without the backtrace of TorchScript: the last line is "builtins.ValueError: message".
std::string refusal(std::string message) {
  message.erase(message.find_last_not_of(" \n") + 1);
  const auto line = message.find_last_of('\n');
  if (line != std::string::npos) message.erase(0, line + 1);
  const std::string kind = "ValueError: ";
  const auto start = message.find(kind);
  return start == std::string::npos ? message : message.substr(start + kind.size());
}

// Module::to(dtype) of LibTorch would also cast the tables of integers; this is what model.double() does in Python.
void set_precision(torch::jit::script::Module& model, torch::ScalarType dtype) {
  const auto cast = [&](torch::Tensor tensor) {
    if (dtype == torch::kFloat64 && tensor.is_floating_point()) tensor.set_data(tensor.to(dtype));
  };
  for (const auto& parameter : model.parameters()) cast(parameter);
  for (const auto& buffer : model.buffers()) cast(buffer);
}

torch::jit::script::Module load(const Options& options) {
  if (!std::ifstream(options.model)) fail(options.model + ": no such file");
  if (options.device.is_cuda() && !torch::cuda::is_available()) fail("--cuda: there is no GPU, or LibTorch has no CUDA");
  try {
    auto model = torch::jit::load(options.model, options.device);
    set_precision(model, options.dtype);
    return model;
  } catch (const c10::Error& error) {
    fail(options.model + ": not a compiled model (" + first_line(error.what_without_backtrace()) + ")");
  }
}

void run(const Options& options) {
  const auto structure = read_xyz(options.xyz);
  auto model = load(options);

  // The optimising executor of TorchScript compiles during the first three calls of a process, which takes far longer
  // than the calls, and gains nothing for this model. Off for this thread, the first call is as quick as all others.
  torch::jit::GraphOptimizerEnabledGuard no_optimizer(false);
  torch::NoGradGuard no_grad;  // forces are computed inside all the same

  const auto batch = make_batch(structure, options);
  const auto output = model.forward({batch}).toGenericDict();
  const auto result = [&](const char* key) { return output.at(key).toTensor(); };
  print_rows("energy", "eV", result("energy"));
  print_rows("forces", "eV/Å", result("forces"));
  print_rows("charges", "e", result("charges"));
  if (output.contains("stress")) print_rows("stress", "eV/Å³", result("stress"));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
    return 0;
  } catch (const torch::jit::JITException& error) {
    std::cerr << "Error: " << refusal(error.what()) << "\n";
  } catch (const std::invalid_argument& error) {
    std::cerr << "Error: " << error.what() << "\n";
  }
  return 2;
}
