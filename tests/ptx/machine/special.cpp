// Special registers (PTX ISA, Special Registers). The environment's, %envreg0 and on, the performance
// counters', %pm0 and on, and those of reserved shared memory have no meaning here and are left out.
#include "special.h"

namespace ptx {
namespace {

constexpr uint64_t FIRST_NANOSECOND = 1000000000000;
constexpr uint32_t WARPS_OF_SM = 64;
constexpr uint32_t SHARED_UNIT = 128;  // of allocations of shared memory

template <int I>
uint64_t tid(const Step& step, int lane) {
  const uint32_t* block = step.launch.options.block;
  const uint32_t thread = step.warp.thread(lane);
  if (I == 0) return thread % block[0];
  if (I == 1) return thread / block[0] % block[1];
  return thread / block[0] / block[1];
}
template <int I>
uint64_t ntid(const Step& step, int) {
  return step.launch.options.block[I];
}
template <int I>
uint64_t ctaid(const Step& step, int) {
  return step.cta.id[I];
}
template <int I>
uint64_t nctaid(const Step& step, int) {
  return step.launch.options.grid[I];
}
template <int I>
uint64_t clusterid(const Step& step, int) {
  return step.cta.id[I] / step.launch.options.cluster[I];
}
template <int I>
uint64_t nclusterid(const Step& step, int) {
  return step.launch.options.grid[I] / step.launch.options.cluster[I];
}
template <int I>
uint64_t cluster_ctaid(const Step& step, int) {
  return step.cta.id[I] % step.launch.options.cluster[I];
}
template <int I>
uint64_t cluster_nctaid(const Step& step, int) {
  return step.launch.options.cluster[I];
}
uint64_t zero(const Step&, int) { return 0; }

uint64_t cluster_ctarank(const Step& step, int) { return step.cta.rank; }
uint64_t cluster_nctarank(const Step& step, int) { return step.cta.cluster->ctas.size(); }
uint64_t is_explicit_cluster(const Step& step, int) {
  return step.launch.program.cluster[0] != 0 || step.launch.options.in_clusters;
}

uint64_t laneid(const Step&, int lane) { return lane; }
uint64_t warpid(const Step& step, int) { return step.warp.index; }
uint64_t nwarpid(const Step&, int) { return WARPS_OF_SM; }
// As many multiprocessors as CTAs are resident at once.
uint64_t nsmid(const Step& step, int) { return step.launch.options.resident; }
uint64_t smid(const Step& step, int lane) { return step.cta.linear % nsmid(step, lane); }
uint64_t gridid(const Step&, int) { return 1; }

uint64_t lanemask_eq(const Step&, int lane) { return 1u << lane; }
uint64_t lanemask_lt(const Step&, int lane) { return (1u << lane) - 1; }
uint64_t lanemask_le(const Step&, int lane) { return ALL >> (LANES - 1 - lane); }
uint64_t lanemask_gt(const Step&, int lane) { return ~(ALL >> (LANES - 1 - lane)); }
uint64_t lanemask_ge(const Step&, int lane) { return ALL << lane; }

// A cycle and a nanosecond a step: time passes, and timeouts of seconds don't end.
uint64_t clock(const Step& step, int) { return step.launch.steps; }
uint64_t clock_lo(const Step& step, int) { return uint32_t(step.launch.steps); }
uint64_t clock_hi(const Step& step, int) { return step.launch.steps >> 32; }
uint64_t timer(const Step& step, int) { return FIRST_NANOSECOND + step.launch.steps; }
uint64_t timer_lo(const Step& step, int lane) { return uint32_t(timer(step, lane)); }
uint64_t timer_hi(const Step& step, int lane) { return timer(step, lane) >> 32; }

uint64_t dynamic_shared(const Step& step, int) { return step.launch.options.dynamic_shared; }
uint64_t total_shared(const Step& step, int lane) {
  const uint64_t bytes = step.launch.program.shared + dynamic_shared(step, lane);
  return (bytes + SHARED_UNIT - 1) / SHARED_UNIT * SHARED_UNIT;
}
uint64_t all_shared(const Step& step, int lane) { return SHARED_START + total_shared(step, lane); }

std::map<std::string, Special> make_specials() {
  std::map<std::string, Special> all = {
      {"%cluster_ctarank", {32, cluster_ctarank}},
      {"%cluster_nctarank", {32, cluster_nctarank}},
      {"%is_explicit_cluster", {1, is_explicit_cluster}},
      {"%laneid", {32, laneid}},
      {"%warpid", {32, warpid}},
      {"%nwarpid", {32, nwarpid}},
      {"%smid", {32, smid}},
      {"%nsmid", {32, nsmid}},
      {"%gridid", {64, gridid}},
      {"%lanemask_eq", {32, lanemask_eq}},
      {"%lanemask_lt", {32, lanemask_lt}},
      {"%lanemask_le", {32, lanemask_le}},
      {"%lanemask_gt", {32, lanemask_gt}},
      {"%lanemask_ge", {32, lanemask_ge}},
      {"%clock", {32, clock_lo}},
      {"%clock_hi", {32, clock_hi}},
      {"%clock64", {64, clock}},
      {"%globaltimer", {64, timer}},
      {"%globaltimer_lo", {32, timer_lo}},
      {"%globaltimer_hi", {32, timer_hi}},
      {"%dynamic_smem_size", {32, dynamic_shared}},
      {"%total_smem_size", {32, total_shared}},
      {"%aggr_smem_size", {32, all_shared}},
  };
  using Value = uint64_t (*)(const Step&, int);
  auto three = [&](const std::string& name, Value x, Value y, Value z) {
    all[name + ".x"] = {32, x};
    all[name + ".y"] = {32, y};
    all[name + ".z"] = {32, z};
    all[name + ".w"] = {32, zero};
  };
  three("%tid", tid<0>, tid<1>, tid<2>);
  three("%ntid", ntid<0>, ntid<1>, ntid<2>);
  three("%ctaid", ctaid<0>, ctaid<1>, ctaid<2>);
  three("%nctaid", nctaid<0>, nctaid<1>, nctaid<2>);
  three("%clusterid", clusterid<0>, clusterid<1>, clusterid<2>);
  three("%nclusterid", nclusterid<0>, nclusterid<1>, nclusterid<2>);
  three("%cluster_ctaid", cluster_ctaid<0>, cluster_ctaid<1>, cluster_ctaid<2>);
  three("%cluster_nctaid", cluster_nctaid<0>, cluster_nctaid<1>, cluster_nctaid<2>);
  return all;
}

}  // namespace

const Special* special_register(const std::string& name) {
  static const std::map<std::string, Special> all = make_specials();
  const auto found = all.find(name);
  return found == all.end() ? nullptr : &found->second;
}

}  // namespace ptx
