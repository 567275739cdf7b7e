// Random layers through the kernels, from several threads at once; meant to be built with sanitizers (see CONTRIBUTING.md).
//
//     stress [layers] [callers] [seed]
//
// Every array ends where an inaccessible page begins. Checked of each layer, on every instruction set that runs here: the same bits from
// 1, 2, 3 and 4 threads and for one sample alone, and float32 and float64 close to each other. Of every three,
// one layer is of torch's cells, one of a cell that random programs make up, and one is the errors of a map, propagated back.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <thread>
#include <vector>

#include "stress_layers.h"
#include "stress_programs.h"
#include "stress_rows.h"

namespace {

using namespace stress;

// test(shape, instruction set, random) on each of them; whether all went well.
template <class Shape, class Test>
bool passes(const Shape& s, Random& random, Test test) {
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (kernels<float>(isa) == nullptr) continue;
    try {
      test(s, isa, random);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s: %s\n  %s\n", isa, error.what(), s.text().c_str());
      return false;
    }
  }
  return true;
}

bool work(long count, uint64_t seed) {
  Random random(seed);
  for (long i = 0; i < count; ++i) {
    const bool passed = i % 3 == 0   ? passes(layers::shape(random), random, layers::test)
                        : i % 3 == 1 ? passes(programs::shape(random), random, programs::test)
                                     : passes(rows::shape(random), random, rows::test);
    if (passed) continue;
    std::fprintf(stderr, "  layer %ld of seed %llu\n", i, static_cast<unsigned long long>(seed));
    return false;
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const long layers = count > 1 ? std::atol(arguments[1]) : 100;
  const int callers = count > 2 ? std::atoi(arguments[2]) : 2;
  const uint64_t seed = count > 3 ? std::strtoull(arguments[3], nullptr, 10) : 0;
  std::vector<std::thread> threads;
  std::vector<int> passed(static_cast<size_t>(callers));
  for (int i = 0; i < callers; ++i)
    threads.emplace_back([&, i] { passed[static_cast<size_t>(i)] = work(layers / callers, seed + static_cast<uint64_t>(i)); });
  for (auto& thread : threads) thread.join();
  for (int each : passed)
    if (!each) return 1;
  std::printf("%ld layers from %d callers: all right\n", layers / callers * callers, callers);
  return 0;
}
